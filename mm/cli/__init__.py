"""The program: `mm serve`, `mm demo`, `mm runtime …`, `mm model …`."""
