"""Commands that ask tasks."""
