"""`python -m ip2p` is `ip2p`."""

from ip2p.cli.main import entry

if __name__ == "__main__":
    entry()
