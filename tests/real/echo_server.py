"""An asyncio server that says every line again: echo_server.py PORT."""

import asyncio
import sys


async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=2000)
    async with server:
        await server.serve_forever()


asyncio.run(main())
