"""Which job do tests of jobs start from?"""

from thawline.cluster.job.job import Job

JOB = Job(manifest="pets.parquet")
