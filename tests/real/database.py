"""SQLite in the middle of a transaction: locks on a database that is mapped too, and a temporary file without a name.

usage: database.py DIR. Says it is ready by DIR/ready; on DIR/check-request compares everything with what it must be and
writes DIR/result.
"""

import os
import sqlite3
import subprocess
import sys
import tempfile
import time

DIR = sys.argv[1]
PATH = f"{DIR}/work/data.db"
RIVAL = f"""
import sqlite3
other = sqlite3.connect({PATH!r}, timeout=0, isolation_level=None)
print(other.execute("select count(*) from numbers").fetchone()[0])
try:
    other.execute("begin immediate")
    print("free")
except sqlite3.OperationalError as error:
    print(error)
"""


def say(name, text):
    with open(f"{DIR}/.{name}", "w") as file:
        file.write(text)
    os.rename(f"{DIR}/.{name}", f"{DIR}/{name}")


def rival():
    """What another process sees: rows, and whether it may write."""
    done = subprocess.run([sys.executable, "-c", RIVAL], capture_output=True, text=True, check=True)
    rows, state = done.stdout.splitlines()
    return int(rows), state


def main():
    database = sqlite3.connect(PATH, isolation_level=None)
    database.execute("pragma journal_mode = wal")
    database.execute("create table numbers (n integer, text text)")
    database.executemany("insert into numbers values (?, ?)", [(n, "x" * n) for n in range(100)])
    database.execute("begin immediate")
    database.executemany("insert into numbers values (?, ?)", [(n, "y" * n) for n in range(100, 150)])
    scratch = tempfile.TemporaryFile(dir=f"{DIR}/work")
    scratch.write(b"scratch " * 10_000)
    scratch.flush()
    say("ready", str(os.getpid()))
    while not os.path.exists(f"{DIR}/check-request"):
        time.sleep(0.005)
    with open(f"{DIR}/check-request") as request:
        if request.read() == "sabotage":
            database.execute("rollback")
    wrong = []
    if (seen := rival()) != (100, "database is locked"):
        wrong.append(f"another process sees {seen}")
    if database.in_transaction:
        database.execute("commit")
    if (seen := rival()) != (150, "free"):
        wrong.append(f"after the commit another process sees {seen}")
    rows = database.execute("select sum(n), sum(length(text)) from numbers").fetchone()
    if rows != (11175, 11175):
        wrong.append(f"the rows sum up to {rows}")
    if database.execute("pragma integrity_check").fetchone() != ("ok",):
        wrong.append("the database is damaged")
    scratch.seek(0)
    if scratch.read() != b"scratch " * 10_000:
        wrong.append("the temporary file has changed")
    say("result", "FAIL: " + "; ".join(wrong) if wrong else "PASS")


main()
