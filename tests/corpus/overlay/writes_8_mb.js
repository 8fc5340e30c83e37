const line = "x".repeat(1022);
process.stdout.write(JSON.stringify(Array.from({ length: 8192 }, () => line)) + "\n");
