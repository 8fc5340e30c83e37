"""Runners carry an admitted job to an overlay and bring back an outcome. They know nothing of the bus.

Read `base` first, the words of it all. Then, by the way in which a call is carried:

    process             a program for each call; python_command says which can be forked, output what a program says
    workers             programs that take call after call: worker_pool, worker, worker_pipes
    http                services that are called; http_client is one exchange, breaker leaves a sick one alone, and
                        purges tells them to let go of their caches
    services            those that the bus starts: service, probe, ports, faults
    alarm               one timer for the deadlines of many calls
    logs                what all of them wrote
    unstarted           why one could not be started

What starts them is beside the bus, as the bus itself is too big and too busy to: helpers are asked for a helper, helper
is one of them seen from here, at the other end of a wire, with contained, exits and helper_errors for what it tells,
and processes are what it started;
strays is a last resort, as is scratch_root for the files of calls, and tiers says where those lie; cgroups are what the
kernel limits the memory of calls by, where it lets the bus; sealed_file is what a program reads. Such a helper runs
launch, containment and sandbox under the bus's interpreter; inside and launcher with channel, execution, descendants,
watching and scratch, in mode fork under the overlay's; and zygote with zygote_script, zygote_reading, zygote_loading
and zygote_ending.

What the kernel is to hold them to is a plan that confinement makes, of kernel (what it can), programs and places (what
a process may execute and read), and seccomp with bpf and syscalls (what it may ask for); trial and probe_rights try it.
"""
