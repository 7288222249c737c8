#!/bin/sh
# Run once by PostgreSQL's image on an empty data directory: the databases of MLflow and of its accounts beside the ledger.
set -eu
createdb --username "$POSTGRES_USER" mlflow
createdb --username "$POSTGRES_USER" accounts
