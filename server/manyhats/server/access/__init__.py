"""Who may call what: tokens, certificates, rules."""
