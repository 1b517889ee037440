# A pipeline over five processes that counts, a background job, and a shell that watches both. usage: pipeline.sh DIR
cd "$1" || exit 1
mkfifo work/idle
exec 9<>work/idle
sleep 100000 &
job=$!
{
  i=0
  while [ ! -e check-request ]; do
    i=$((i + 1))
    echo $i
    read -r -t 0.003 <&9
  done
} | sed -u 's/^/n=/' | grep --line-buffered '^n=' | awk '{ print; fflush() }' | while read -r line; do echo "$line"; done >work/out &
line=$!
until [ -s work/out ]; do read -r -t 0.01 <&9; done
echo $$ >.ready && mv .ready ready
until [ -e check-request ]; do read -r -t 0.01 <&9; done
verdict=PASS
wait $line || verdict="FAIL: the pipeline ended with $?"
kill -0 $job || verdict="FAIL: the background job is gone"
[ "$(jobs -r | wc -l)" = 1 ] || verdict="FAIL: the shell does not know its job"
kill $job
wait $job
[ $? = 143 ] || verdict="FAIL: the job did not end as it should"
n=$(wc -l <work/out)
seq -f n=%.0f "$n" | cmp -s - work/out || verdict="FAIL: lines are missing, doubled or changed, of $n"
[ "$n" -gt 3 ] || verdict="FAIL: only $n lines"
echo "$verdict" >.result && mv .result result
