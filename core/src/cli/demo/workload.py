"""What `stasis demo` dumps and restores: four threads that compute and count, a file that gets a line for each step, and
a child that answers over two channels.

usage: workload.py DIR. Appends to DIR/journal: "NAME COUNT BEFORE AFTER", where AFTER of one line is BEFORE of the next
line of that name. When DIR/ask appears, DIR/gap gets the longest time, in seconds, between two heartbeats since the last
question.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time

DIR = sys.argv[1]
CHILD = "import sys\nfor line in sys.stdin:\n    print(int(line) * 31 % 1000003, flush=True)\n"
HEARTBEAT = 0.001


def compute(name, journal):
    """A chain of hashes: whoever loses a step, or does one twice, breaks it."""
    count, state = 0, name
    while True:
        after = hashlib.sha256(state.encode() * 4096).hexdigest()[:12]
        count += 1
        os.write(journal, f"{name} {count} {state} {after}\n".encode())
        state = after
        time.sleep(0.004)


def converse(name, journal):
    """Asks the child for the next number of a chain."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    count, number = 0, 1
    while True:
        child.stdin.write(f"{number}\n")
        child.stdin.flush()
        after = int(child.stdout.readline())
        count += 1
        os.write(journal, f"{name} {count} {number} {after}\n".encode())
        number = after
        time.sleep(0.004)


def main():
    os.setsid()
    # What the shell had open leads out of the tree.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.setswitchinterval(0.0005)
    journal = os.open(f"{DIR}/journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in range(1, 5):
        threading.Thread(target=compute, args=(f"thread-{number}", journal), daemon=True).start()
    threading.Thread(target=converse, args=("child", journal), daemon=True).start()
    last, longest = time.monotonic(), 0.0
    while True:
        time.sleep(HEARTBEAT)
        now = time.monotonic()
        longest = max(longest, now - last)
        last = now
        if os.path.exists(f"{DIR}/ask"):
            with open(f"{DIR}/.gap", "w") as file:
                file.write(str(longest))
            os.remove(f"{DIR}/ask")
            os.rename(f"{DIR}/.gap", f"{DIR}/gap")
            last, longest = time.monotonic(), 0.0


main()
