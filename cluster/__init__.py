"""Everything about machines: starting nodes, a cluster on one machine, and submitting jobs to one."""

from zsr.interrupt import watch_command

watch_command()
