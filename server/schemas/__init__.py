"""Bodies of requests and answers. Every field of a request has bounds; knows no engine state and no store."""
