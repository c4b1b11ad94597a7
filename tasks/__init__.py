"""The shipped catalogue: `<domain>.yaml` holds a domain's definitions, `<domain>.py` the functions of those that run Python.

A function takes the running job and returns something that JSON can hold; the platform keeps it in the job's history.
It reads nothing but the job, so a repeated attempt gives the same result. Parameters that it cannot use raise ValueError.
"""
