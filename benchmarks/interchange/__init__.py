"""Whether what ip2p writes opens in other versions of other tools."""
