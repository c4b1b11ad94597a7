"""The systems that the HTTP jobs run beside.

Each module has the task as that system's users would write it, and `send(url, count)`, which submits jobs that call `url`. Its broker is at
the URL in the environment variable BENCH_BROKER when it is imported. Results are switched off where a system lets one.
"""
