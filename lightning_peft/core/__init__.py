"""How an adapter hangs on a module: slots, hooks, what was injected, weights in pieces. Imports ``errors`` alone."""
