"""Tasks of the lab: functions of the config that return a `gaf_lab.Problem`."""
