"""Four threads compute and count, a file gets a line for each step, and a child answers over a channel.

usage: threads.py DIR. Says it is ready by DIR/ready; on DIR/check-request compares everything with what it must be and
writes DIR/result.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time

DIR = sys.argv[1]
CHILD = "import sys\nfor line in sys.stdin:\n    print(int(line) * 3 + 1, flush=True)\n"


def say(name, text):
    with open(f"{DIR}/.{name}", "w") as file:
        file.write(text)
    os.rename(f"{DIR}/.{name}", f"{DIR}/{name}")


class Worker(threading.Thread):
    """Hashes its own hash, again and again, and writes down each step."""

    def __init__(self, number, journal, lock):
        super().__init__(name=f"worker-{number}")
        self.number, self.journal, self.lock = number, journal, lock
        self.count, self.state, self.stop = 0, bytes([number]) * 4096, False

    def step(self):
        self.count += 1
        self.state = hashlib.sha256(self.state).digest() * 128
        return f"{self.number} {self.count} {self.state[:8].hex()}\n"

    def run(self):
        while not self.stop:
            line = self.step()
            with self.lock:
                self.journal.write(line)
            time.sleep(0.001)


def replay(number, steps):
    """What worker `number` must have written."""
    worker = Worker(number, None, None)
    return [worker.step() for _ in range(steps)]


def main():
    journal = open(f"{DIR}/work/journal", "w", buffering=1)
    lock = threading.Lock()
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [Worker(n, journal, lock) for n in range(4)]
    for worker in workers:
        worker.start()
    asked = 0
    begun = time.monotonic()
    while not os.path.exists(f"{DIR}/check-request"):
        child.stdin.write(f"{asked}\n")
        child.stdin.flush()
        answer = int(child.stdout.readline())
        if answer != asked * 3 + 1:
            return f"FAIL: the child answered {answer} to {asked}"
        asked += 1
        if asked == 20:
            say("ready", str(os.getpid()))
        time.sleep(0.002)
    for worker in workers:
        worker.stop = True
    for worker in workers:
        worker.join()
    child.stdin.close()
    if child.wait() != 0:
        return f"FAIL: the child ended with {child.returncode}"
    journal.close()
    with open(f"{DIR}/work/journal") as file:
        lines = file.readlines()
    for worker in workers:
        own = [line for line in lines if line.startswith(f"{worker.number} ")]
        if own != replay(worker.number, worker.count):
            return f"FAIL: worker {worker.number} left out or repeated a step, of {worker.count}"
    if len(lines) != sum(worker.count for worker in workers):
        return "FAIL: the file holds other lines"
    if time.monotonic() < begun:
        return "FAIL: time went back"
    return "PASS"


if __name__ == "__main__":
    say("result", main())
