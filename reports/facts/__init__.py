"""What a report says: which finding is present, absent or uncertain, where, how severe, and whether it changed."""
