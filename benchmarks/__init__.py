"""Contests with peers, the real model's tables, and what a card shows. Imports tiercache; nothing imports it."""
