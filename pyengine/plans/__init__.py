"""What a build writes and a later start finds again."""
