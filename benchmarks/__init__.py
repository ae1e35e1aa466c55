"""How fast, and how lossless: we and our peers against straight ZeroMQ, in one run on one machine.

    python -m benchmarks              everything; half an hour
    python -m benchmarks --quick      few rounds; two or three minutes
    python -m benchmarks --only rtt-null --rounds 5

`servers` starts what is compared, `clients` speaks to it, `measures` holds one function a measure,
`rows` says what the numbers mean, `report` shows them. `null_kernel` costs nearly nothing, so that
what stands between it and its client is what is measured.
"""
