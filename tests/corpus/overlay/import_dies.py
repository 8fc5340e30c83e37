import dies
