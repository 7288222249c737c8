#!/bin/sh
# Runs a command with the passwords that lie in files, one a secret: none of them stands on a command line or in a URL.
set -eu
secrets="${BASD_SECRETS:-/run/secrets}"

if [ -f "$secrets/postgres_password" ]; then
  PGPASSWORD="$(cat "$secrets/postgres_password")"
  export PGPASSWORD
fi

# MLflow's accounts: the workers' side, and on the server the file that its basic-auth app reads
if [ -n "${MLFLOW_AUTH:-}" ]; then
  MLFLOW_TRACKING_USERNAME=admin
  MLFLOW_TRACKING_PASSWORD="$(cat "$secrets/mlflow_password")"
  MLFLOW_FLASK_SERVER_SECRET_KEY="$MLFLOW_TRACKING_PASSWORD"
  export MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
  if [ -n "${MLFLOW_AUTH_DATABASE:-}" ]; then
    MLFLOW_AUTH_CONFIG_PATH="${BASD_AUTH_DIRECTORY:-/run/auth}/basic_auth.ini"
    export MLFLOW_AUTH_CONFIG_PATH
    umask 077
    cat > "$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = READ
database_uri = $MLFLOW_AUTH_DATABASE
admin_username = admin
admin_password = $MLFLOW_TRACKING_PASSWORD
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
  fi
fi

exec "$@"
