"""What is submitted to a cluster: `ray job submit -- python -m jobs.NAME FLAGS` runs `zsr NAME FLAGS` there."""

from zsr.interrupt import watch_command

watch_command()
