"""redis-server on a unix socket, its child, and a client that talks to it over one and the same connection.

usage: redis.py DIR SERVER. Says it is ready by DIR/ready; on DIR/check-request looks for everything that was stored and
writes DIR/result.
"""

import os
import socket
import subprocess
import sys
import time

DIR, SERVER = sys.argv[1], sys.argv[2]
PATH = f"{DIR}/work/redis"


def say(name, text):
    with open(f"{DIR}/.{name}", "w") as file:
        file.write(text)
    os.rename(f"{DIR}/.{name}", f"{DIR}/{name}")


class Redis:
    """One connection."""

    def __init__(self):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(PATH)
        self.stream = self.connection.makefile("rb")

    def send(self, *words):
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            word = str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.connection.sendall(b"".join(parts))

    def reply(self):
        line = self.stream.readline()
        if line[:1] == b"$":
            size = int(line[1:])
            return None if size < 0 else self.stream.read(size + 2)[:-2].decode()
        return line[1:].strip().decode()

    def ask(self, *words):
        self.send(*words)
        return self.reply()


def main():
    arguments = ["--port", "0", "--unixsocket", PATH, "--save", "", "--appendonly", "no", "--dir", f"{DIR}/work"]
    server = subprocess.Popen([SERVER, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    redis = None
    while redis is None:
        try:
            redis = Redis()
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)
    identity = redis.ask("CLIENT", "ID")
    for n in range(1000):
        redis.ask("SET", f"key{n}", f"value{n}" * 20)
    # Others subscribe; a request is always under way.
    listener = Redis()
    listener.send("SUBSCRIBE", "news")
    count = 0
    redis.send("INCR", "count")
    while not os.path.exists(f"{DIR}/check-request"):
        count += 1
        if int(redis.reply()) != count:
            return f"FAIL: the count is not {count}"
        redis.send("INCR", "count")
        if count == 100:
            say("ready", str(os.getpid()))
    redis.reply()
    for n in range(1000):
        if redis.ask("GET", f"key{n}") != f"value{n}" * 20:
            return f"FAIL: key{n} has another value"
    if redis.ask("CLIENT", "ID") != identity:
        return "FAIL: the connection is another one"
    if redis.ask("PUBLISH", "news", "hello") != "1":
        return "FAIL: the subscriber is lost"
    if Redis().ask("GET", "count") != str(count + 1):
        return "FAIL: a new client is told another count"
    server.terminate()
    return "PASS" if server.wait() == 0 else "FAIL: the server did not end well"


if __name__ == "__main__":
    verdict = main()
    say("result", verdict)
