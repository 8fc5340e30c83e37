import asyncio
import sys


async def main():
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    except ValueError as error:
        return print(error)
    print(await reader.read())
    transport.close()


asyncio.run(main())
