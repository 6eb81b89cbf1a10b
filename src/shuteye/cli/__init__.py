"""The `shuteye` command: one file per subcommand. The only place that reads the environment and files of settings."""
