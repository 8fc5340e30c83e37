"""Overlays that try to get out, each by one way, called over HTTP on a real server.

An attempt is a function in `programs/`, made a real overlay in a temporary folder, in mode fork and in mode spawn (some
also as a worker). It is called in the phases whose rights forbid it, where it has to fail with the documented error,
and in those whose rights allow it, where it has to work. The servers are started by root, by an ordinary user, and by
one whose kernel gives no user namespaces. A server that holds nothing shows that each attempt can succeed at all.
Reading order:

    attempts    the table: what is tried, by which function, which phases allow or forbid it, how it is refused
    programs/   the functions, and how an overlay tells what came of one
    place       the folder of a server, and what the attempts aim at: files, sockets, a process of another overlay
    overlays    an attempt as an overlay
    as_user     a program that goes on as an ordinary user
    server      `aal serve` for one user, with every attempt made
"""
