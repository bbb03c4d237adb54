"""Commands, one per stage: `python -m jobs.NAME --help`."""

from zsr.interrupt import watch_command

watch_command()
