# script passed
import asyncio


async def main():
    await asyncio.sleep(0.01)
    print("contained")


asyncio.run(main())
