"""Many faults and kills, in random order, in whole runs."""
