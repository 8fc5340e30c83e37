"""The service: HTTP for people and programs, one route for the bus, and the web page.

`main` is the application, `routes` its addresses, `bus_route` that of the bus; `bodies` and `queries` read what is
sent, `answers` makes what is answered, `guard` keeps foreign web pages out. Whatever touches files runs in threads.
"""
