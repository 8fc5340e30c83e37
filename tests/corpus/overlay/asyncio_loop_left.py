import asyncio


class Loud:
    def __del__(self):
        print("finalized")


loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.loud = Loud()


async def never():
    await asyncio.sleep(3600)


task = loop.create_task(never())
loop.run_until_complete(asyncio.sleep(0))
