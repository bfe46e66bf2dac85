#!/bin/sh
# In place of ssh: `local_node.sh HOST COMMAND…` runs the command here, in a process whose host name is HOST.
host=$1
shift
exec unshare --uts sh -c "hostname $host; $*"
