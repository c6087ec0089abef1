"""`kseed-edge doctor`: one check after the other, each with what it found and, where something is wrong, a remedy."""
