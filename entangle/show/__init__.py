"""Figures, reports and notebook views of results."""
