# script passed network
import socket

opened = []
for family, kind in (
    ("AF_INET", "SOCK_STREAM"),
    ("AF_INET", "SOCK_DGRAM"),
    ("AF_INET6", "SOCK_STREAM"),
    ("AF_UNIX", "SOCK_STREAM"),
    ("AF_VSOCK", "SOCK_STREAM"),
    ("AF_NETLINK", "SOCK_RAW"),
    ("AF_PACKET", "SOCK_RAW"),
):
    try:
        socket.socket(getattr(socket, family), getattr(socket, kind))
        opened.append(family)
    except OSError:
        pass
print(opened or "contained")
