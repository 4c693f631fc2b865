"""Contests with peers, the real model's tables, and what a card shows; imports tiercache, and nothing imports it."""
