"""What the scripts beside this folder are made of; `README.md` there says what each script does."""
