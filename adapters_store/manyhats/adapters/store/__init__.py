"""The adapter store: registrations, versions, uploads and maintenance."""
