"""What the engine counts, in Prometheus' terms. Served by whoever exposes the default registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30)

REQUESTS = Counter("cosy_requests", "Requests by mode and outcome", ["mode", "outcome"])
ACTIVE = Gauge("cosy_requests_active", "Requests being worked on")
WAITING = Gauge("cosy_requests_waiting", "Requests in the queue")
QUEUE_SECONDS = Histogram("cosy_queue_seconds", "From submission to the request's turn", buckets=_LATENCY)
FIRST_AUDIO_SECONDS = Histogram("cosy_first_audio_seconds", "From submission to the first sound", buckets=_LATENCY)
REAL_TIME_FACTOR = Histogram(
    "cosy_real_time_factor",
    "Seconds of work per second of sound",
    buckets=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 2, 5),
)
FLOW_OUT_OF_PROFILE = Counter(
    "cosy_flow_out_of_profile", "Estimator calls that ran on PyTorch because TensorRT's profile has no room for them"
)
AUDIO_SECONDS = Counter("cosy_audio_seconds", "Seconds of sound made")
SPEECH_TOKENS = Counter("cosy_speech_tokens", "Speech tokens made by the speech LM")
