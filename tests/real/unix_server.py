"""A server on a unix socket answers three clients, its children, without a pause.

usage: unix_server.py DIR. Says it is ready by DIR/ready; on DIR/check-request the clients compare all answers with what
they must be, and DIR/result is written.
"""

import hashlib
import os
import selectors
import socket
import struct
import sys

DIR = sys.argv[1]
PATH = f"{DIR}/work/socket"


def say(name, text):
    with open(f"{DIR}/.{name}", "w") as file:
        file.write(text)
    os.rename(f"{DIR}/.{name}", f"{DIR}/{name}")


def answer_to(line):
    return hashlib.sha256(line).hexdigest().encode() + b"\n"


def peer_pid(connection):
    return struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def client(number, server):
    """Asks and compares until it is told to stop; always two questions are under way."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(PATH)
    stream = connection.makefile("rwb", buffering=0)
    asked, answered = 0, 0
    while answered < asked or not os.path.exists(f"{DIR}/check-request"):
        while asked < answered + 2:
            stream.write(f"{number} {asked}\n".encode())
            asked += 1
        if stream.readline() != answer_to(f"{number} {answered}\n".encode()):
            return 1
        answered += 1
        if answered == 50:
            say(f"ready.{number}", "")
        if answered + 2 > asked and os.path.exists(f"{DIR}/check-request"):
            while answered < asked:
                if stream.readline() != answer_to(f"{number} {answered}\n".encode()):
                    return 1
                answered += 1
    return 0 if peer_pid(connection) == server and connection.getpeername() == PATH else 2


def main():
    server = socket.socket(socket.AF_UNIX)
    server.bind(PATH)
    server.listen(10)
    me, children = os.getpid(), set()
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(client(number, me))
        children.add(pid)
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    waiting, seen, ready = {}, set(), False
    left = len(children)
    while left:
        for key, _ in selector.select(0.05):
            if key.fileobj is server:
                connection, _ = server.accept()
                seen.add(peer_pid(connection))
                waiting[connection] = b""
                selector.register(connection, selectors.EVENT_READ)
                continue
            data = key.fileobj.recv(4096)
            if not data:
                selector.unregister(key.fileobj)
                if peer_pid(key.fileobj) not in seen:
                    return "FAIL: a connection has another peer than before"
                left -= 1
                continue
            *lines, waiting[key.fileobj] = (waiting[key.fileobj] + data).split(b"\n")
            for line in lines:
                key.fileobj.sendall(answer_to(line + b"\n"))
        if not ready and all(os.path.exists(f"{DIR}/ready.{number}") for number in range(3)):
            say("ready", str(me))
            ready = True
    for pid in children:
        _, status = os.waitpid(pid, 0)
        if status != 0:
            return f"FAIL: a client ended with {status}"
    if seen != children:
        return f"FAIL: clients {seen} were accepted, of {children}"
    late = socket.socket(socket.AF_UNIX)
    late.connect(PATH)
    accepted, _ = server.accept()
    late.sendall(b"late")
    return "PASS" if accepted.recv(9) == b"late" else "FAIL: the server listens no more"


if __name__ == "__main__":
    verdict = main()
    say("result", verdict)
