"""Output for people and programs: messages, tables, pages and pictures for the one, JSON documents for the other."""
