import multiprocessing


def work(number, queue):
    queue.put(number * 2)


context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
processes = [context.Process(target=work, args=(number, queue)) for number in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print(sorted(queue.get() for _ in processes), [process.exitcode for process in processes])
print(multiprocessing.current_process().name, multiprocessing.parent_process())
