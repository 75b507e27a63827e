"""From the engine's thread to the loop: in order, together, and never lost."""

import asyncio
import threading

from server.bridge import Bridge


async def test_everything_arrives_in_order():
    """Four threads post as fast as they can; each one's order is kept, and no post waits for a wake-up in vain."""
    bridge = Bridge(asyncio.get_running_loop())
    arrived: dict[int, list[int]] = {k: [] for k in range(4)}

    def post(thread):
        for number in range(5000):
            bridge.post(lambda number=number: arrived[thread].append(number))

    threads = [threading.Thread(target=post, args=(k,)) for k in arrived]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(20):
        while any(len(got) < 5000 for got in arrived.values()):
            await asyncio.sleep(0.001)
    for thread in threads:
        thread.join()
    assert all(got == list(range(5000)) for got in arrived.values())


async def test_many_posts_are_one_wake_up(monkeypatch):
    loop = asyncio.get_running_loop()
    wakes = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: wakes.append(loop.call_soon(call)))
    bridge = Bridge(loop)
    got = []
    for number in range(100):
        bridge.post(lambda number=number: got.append(number))
    await asyncio.sleep(0)
    assert (len(wakes), got) == (1, list(range(100)))
    bridge.post(lambda: got.append(100))
    await asyncio.sleep(0)
    assert (len(wakes), got[-1]) == (2, 100)


def test_a_loop_that_is_gone_takes_nothing():
    """The engine must not fall over a server that has ended."""
    loop = asyncio.new_event_loop()
    bridge = Bridge(loop)
    loop.close()
    bridge.post(lambda: None)
    bridge.post(lambda: None)
