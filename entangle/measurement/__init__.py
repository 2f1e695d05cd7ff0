"""What neurons do: their distributions recorded, ranked, compared and looked into."""
