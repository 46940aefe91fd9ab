"""What people and programs get to see: messages and tables for the one, JSON documents for the other."""
