import asyncio
import os
import signal


async def main():
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    process = await asyncio.create_subprocess_exec("sh", "-c", "echo from sh")
    print(await process.wait(), await asyncio.to_thread(os.getpid) == os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
    await stopped.wait()
    return "done"


print(asyncio.run(main()))
