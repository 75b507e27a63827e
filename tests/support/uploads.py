"""Uploads as a test makes them: a raw body, and the code of a refusal."""

RAW = {"Content-Type": "application/octet-stream"}


def upload(served, content, status=201, task="new", headers=(), **query):
    answer = served.client.post(
        f"/v1/prompts/{task}/versions", content=content, headers={**RAW, **dict(headers)}, params=query
    )
    assert answer.status_code == status, answer.text
    return answer


def refused(served, content, status=422, **rest) -> str:
    error = upload(served, content, status, **rest).json()["error"]
    return error["code"]
