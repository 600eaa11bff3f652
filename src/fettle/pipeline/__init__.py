"""Recipe → walk → written checkpoint and ledger: the one loop that every method runs in."""
