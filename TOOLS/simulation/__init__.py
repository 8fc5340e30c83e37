"""A simulation of admission, in the order of reading:

calls         what a trace is made of: calls, how their memory grows, and a trace as a file
synthetic     traces from a seed
recorded      traces from a ledger
machine       virtual memory: the sum of what runs, exact between two events
world         the virtual clock, the clients, and the OOM killer
policies      what decides who runs: the protocol, and what others do
oracle        a policy that knows everything
this_bus      the policy of this bus: its own classes on the virtual clock
tally, report what came of it, and tables of that
command       the command line
"""
