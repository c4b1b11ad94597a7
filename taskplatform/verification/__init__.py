"""`taskplatform verify`: a verification of the platform as it is deployed, and its report.

`run` makes it. `checks`, `disruptive` and `doors` (who gets in at the API and at Redis) have what is checked, `jobs` what these share,
`judges` the arithmetic, `report` and `plot` what is written, `target` the server that jobs call. `functions` is what the definitions of
`taskplatform.drills` run in workers.
"""
